"""``maskgym train-rl`` from a checkout: train the controller by PPO or A2C, evaluate it, and write a run folder."""

from maskgym.training.rl import run_command

if __name__ == "__main__":
    run_command()
