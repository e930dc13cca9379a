"""The page of `oreal report --html`: charts, tables and rollouts of runs, in one file that needs no network.

Modules, in reading order: charts (SVG), run_data (what is read of a run), panels (which charts there are), findings
(what to look at first), tables, token_values, formulas and rollout_files (the rollouts beside the page), page (all
together); page.css, and the scripts, which the page joins. Every text of a run goes through `html.escape`, or into the
document as a text node.
"""
