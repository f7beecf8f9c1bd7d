"""``maskgym train-backbone`` from a checkout: train a VLM under random plans, and save it in Hugging Face format."""

from maskgym.training.backbone import run_command

if __name__ == "__main__":
    run_command()
