"""Fine-tune a language model layer by layer.

deepspeed --num_gpus 2 train.py --config launch/recipes/iterater-smollm2.yaml --data.path FOLDER
torchrun --nproc_per_node 2 train.py --config ... [--section.key value ...]
python train.py --config ...
"""

import sys

from irtune.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
