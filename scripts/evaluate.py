"""Evaluate a trained model: python scripts/evaluate.py --checkpoint models/best_rlhf_model.pt --model-type rlhf"""

from hierarchical_diffusion_rlhf_caption_refinement.cli import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
