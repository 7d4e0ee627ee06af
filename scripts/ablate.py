"""Compare reward-shaping arms over seeds: python scripts/ablate.py configs/ablations/arms.yaml [--jobs 2] [--report-only]"""

from hierarchical_diffusion_rlhf_caption_refinement.ablate import ablate

if __name__ == "__main__":
    raise SystemExit(ablate())
