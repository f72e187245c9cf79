"""Trains a Vision Transformer: flags -> Recipe -> train.

    accelerate launch --config_file accelerate_config.yaml run_train.py --recipe cifar10

`--help` lists the flags and the recipes.
"""

import sys

from modeling_vit_scratch.training.flags import main

if __name__ == "__main__":
    sys.exit(main())
