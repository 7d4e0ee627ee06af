"""Caption images: python scripts/predict.py --checkpoint models/best_rlhf_model.pt --image-url image.jpg"""

from hierarchical_diffusion_rlhf_caption_refinement.cli import predict

if __name__ == "__main__":
    raise SystemExit(predict())
