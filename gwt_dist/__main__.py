"""``python -m gwt_dist``: the command ``gwt-dist``."""

from gwt_dist.cli import start

if __name__ == "__main__":
    start()
