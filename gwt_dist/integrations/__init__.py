"""Glue for the trainers that people use: `transformers`, `accelerate`, `lightning`, `torchtitan`, a module each.

`import gwt_dist` loads none of them.
"""
