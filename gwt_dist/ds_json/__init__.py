"""A DeepSpeed JSON: read by DeepSpeed's rules, and what in it is no value. Knows neither DeepSpeed nor torch."""

from gwt_dist.ds_json.check import autos, checked, misspelt, mistakes, precision, refuse, section_of, value, why_auto
from gwt_dist.ds_json.known import AUTO, FILLED, OPTIMIZER_KEYS, OURS, TOP_LEVEL_KEYS, TYPE
from gwt_dist.ds_json.read import parse, read, settings_of

__all__ = [
    "AUTO",
    "FILLED",
    "OPTIMIZER_KEYS",
    "OURS",
    "TOP_LEVEL_KEYS",
    "TYPE",
    "autos",
    "checked",
    "misspelt",
    "mistakes",
    "parse",
    "precision",
    "read",
    "refuse",
    "section_of",
    "settings_of",
    "value",
    "why_auto",
]
