"""Optimizers to compare with that come as no package which could be installed, each from the formula of its paper."""
