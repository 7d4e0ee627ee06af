"""Train the captioner: python scripts/train.py [--config F] [--stage alignment|base|reward|rlhf|all] [--resume] [key.sub=value ...]"""

from hierarchical_diffusion_rlhf_caption_refinement.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
