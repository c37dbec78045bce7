"""Pre-train a LLaMA; started by the deepspeed launcher, by torchrun, or as one plain process."""

from gwt_dist.train.command import start

if __name__ == "__main__":
    start()
