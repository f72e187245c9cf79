"""RECIPES: named runs, each with its command."""

from typing import Any

from .article_recipes import ARTICLES
from .recipe import Recipe

# what the recipes for CIFAR-10 share
_CIFAR10: dict[str, Any] = dict(
    dataset_name="cifar10", optim="muon", weight_decay=0.01, lr_scheduler_type="warmup_stable_decay",
    lr_decay_steps=0.7, label_smoothing_factor=0.1, horizontal_flip_prob=0.5, crop_padding=4,
    image_mean=(0.4914, 0.4822, 0.4465), image_std=(0.2470, 0.2435, 0.2616),
)  # fmt: skip
_CIFAR10_GPU = {
    **_CIFAR10, "initial_image_size": 24, "train_batch_size": 1024, "train_val_split": 0.02, "torch_compile": True
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    # accelerate launch run_train.py
    # One process with two parts and two processes with one each take bit-identical steps, where both compute with one
    # thread; the network is too small for a second one to help.
    "digits": Recipe(
        recipe="digits", dataset_name="digits", preset="digits", num_train_epochs=100, train_batch_size=64,
        gradient_accumulation_steps=2, cpu_threads=1,
        learning_rate=4e-3, warmup_steps=0.1, label_smoothing_factor=0.1, rotation_degrees=10, translate_pixels=1.0,
        scale_range=0.1, train_val_split=0.1,
    ),
    # accelerate launch run_train.py --recipe mnist
    "mnist": Recipe(
        recipe="mnist", dataset_name="mnist", preset="mnist", num_train_epochs=20, optim="muon", learning_rate=6e-3,
        weight_decay=0.01, lr_scheduler_type="linear", label_smoothing_factor=0.05, rotation_degrees=10,
        translate_pixels=2.0, scale_range=0.1, config_overrides="zero_init_residual=true,position_init=sincos2d",
        image_mean=(0.1307,), image_std=(0.3081,), train_val_split=0.05,
    ),
    # accelerate launch --mixed_precision bf16 run_train.py --recipe cifar10 --time_budget 10m
    "cifar10": Recipe(
        recipe="cifar10", preset="micro", num_train_epochs=10, learning_rate=3e-3, train_val_split=0.1,
        config_overrides="zero_init_residual=true,position_init=sincos2d,patch_drop_rate=0.75", full_size_step=0.75,
        **_CIFAR10,
    ),
    # One GPU of the class of an H200, not yet run: their lengths follow from about 130 TFLOP/s.
    # accelerate launch --mixed_precision bf16 run_train.py --recipe cifar10_60s
    "cifar10_60s": Recipe(
        recipe="cifar10_60s", preset="vit_m_4", num_train_epochs=80, learning_rate=3e-3, auto_augment="randaugment",
        randaugment_num_ops=1, randaugment_magnitude=6,
        config_overrides="zero_init_residual=true,position_embedding_type=rope2d,drop_path_rate=0.05", **_CIFAR10_GPU,
    ),
    "cifar10_5min": Recipe(
        recipe="cifar10_5min", preset="vit_s8_4", num_train_epochs=200, learning_rate=2e-3, auto_augment="randaugment",
        mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.5, mixup_off_step=0.85, random_erasing_prob=0.25,
        ema_decay=0.997,
        config_overrides="zero_init_residual=true,position_embedding_type=rope2d,qk_norm=true,drop_path_rate=0.1",
        **_CIFAR10_GPU,
    ),
    # accelerate launch --num_processes 8 --mixed_precision bf16 run_train.py --recipe imagenet-1k
    # S/16 of "Better plain ViT baselines for ImageNet-1k", 2205.01580; not yet run to its end
    "imagenet-1k": Recipe(
        recipe="imagenet-1k", dataset_name="imagenet-1k", preset="vit_s_16",
        config_overrides="pooling=mean,use_cls_token=false,position_embedding_type=sincos2d", streaming=True,
        num_train_epochs=90, train_batch_size=1024, eval_batch_size=1024, learning_rate=1e-3, weight_decay=0.1,
        warmup_steps=10_000, image_size=224, horizontal_flip_prob=0.5, random_resized_crop_scale=0.05,
        auto_augment="randaugment", randaugment_magnitude=10, mixup_alpha=0.2,
        train_val_split=0.01, stream_lanes=96,
    ),
    # accelerate launch run_train.py --train_dir photos/train
    "folder": Recipe(
        recipe="folder", preset="micro_8", image_size=64, num_train_epochs=50,
        train_batch_size=64, learning_rate=1e-3, label_smoothing_factor=0.1, horizontal_flip_prob=0.5,
        random_resized_crop_scale=0.25, train_val_split=0.15,
    ),
    # accelerate launch run_train.py --train_dir photos/train --model_name_or_path outputs/cifar10/model
    "finetune": Recipe(
        recipe="finetune", num_train_epochs=15, train_batch_size=64, learning_rate=1e-4, layer_decay=0.75,
        warmup_steps=0.1, label_smoothing_factor=0.1, horizontal_flip_prob=0.5, random_resized_crop_scale=0.35,
        train_val_split=0.15,
    ),
    **{name: Recipe(recipe=name, **fields) for name, fields in ARTICLES.items()},
}  # fmt: skip

# what the recipe finetune becomes with --finetune head, ...: fewer weights bear a higher rate; the features of a head
# are computed once, without crops
FINETUNING: dict[str, dict[str, Any]] = {
    "full": {},
    "head": {"learning_rate": 1e-3, "num_train_epochs": 30, "random_resized_crop_scale": None, "layer_decay": 1.0},
    "last": {"learning_rate": 3e-4, "layer_decay": 1.0},
    "attention": {"learning_rate": 3e-4},
    "lora": {"learning_rate": 1e-3, "layer_decay": 1.0, "head_learning_rate_scale": 1.0},
}
