"""Run folder, metrics, timers, dumps, report and viewer."""
