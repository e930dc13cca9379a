"""Listings of the configuration keys: for the terminal, as JSON, and the page docs/reference/config.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from oreal_megatron.config.schema import ConfigKey, Section, config_keys, sections

LONGEST_VALUE = 120  # characters of a value in a terminal


def list_keys(config: Section, width: int) -> str:
    """Return all keys with value, meaning, type, bounds and changed default, in lines of at most `width`."""
    blocks = []
    for path, section, keys in _keys_by_section(config):
        heading = f"# {path.rstrip('.')}: {_title(section)}" if path else f"# {_title(section)}"
        lines = textwrap.wrap(heading, width, subsequent_indent="# ")
        for key in keys:
            value = textwrap.shorten(repr(key.value), LONGEST_VALUE, placeholder=" ...")
            lines += _wrap(f"{key.path} = {value}", width, "  ")
            lines += _wrap(f"    {key.key.meaning} ({', '.join(_details(key))})", width, "    ")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_objects(config: Section) -> list[dict[str, object]]:
    """Return all keys as objects for JSON."""
    return [
        {
            "key": key.path,
            "value": key.value,
            "default": key.default,
            "type": key.type_name,
            "low": key.key.low,
            "high": key.key.high,
            "unit": key.key.unit,
            "on_resume": key.on_resume,
            "meaning": key.key.meaning,
        }
        for key in config_keys(config)
    ]


def markdown(config: Section) -> str:
    """Return the reference page of all keys with their defaults."""
    lines = []
    for path, section, keys in _keys_by_section(config):
        heading = f"`{path.rstrip('.')}`" if path else "Top level"
        lines += [
            f"## {heading}",
            "",
            _title(section) + ".",
            "",
            "| key | type | default | bounds | on resume | meaning |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for key in keys:
            value = f"`{key.value!r}`"
            cells = (f"`{key.path}`", key.type_name, value, key.key.bounds, key.on_resume, key.key.meaning)
            lines.append(f"| {' | '.join(_escape(cell) for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _keys_by_section(config: Section) -> Iterator[tuple[str, Section, list[ConfigKey]]]:
    keys = list(config_keys(config))
    for path, section in sections(config):
        own = [key for key in keys if key.path.rpartition(".")[0] == path.rstrip(".")]
        yield path, section, own


def _title(section: Section) -> str:
    return (section.__doc__ or "").partition("\n")[0].rstrip(".")


def _details(key: ConfigKey) -> list[str]:
    default = [] if key.value == key.default else [f"default {key.default!r}"]
    resume = [] if key.on_resume == "announced" else [f"{key.on_resume} on resume"]
    return [key.type_name, *([key.key.bounds] if key.key.bounds else []), *default, *resume]


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;") if not cell.startswith("`") else cell.replace("|", "\\|")
