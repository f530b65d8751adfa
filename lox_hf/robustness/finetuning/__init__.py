"""One fine-tuning by TRL's SFTTrainer, and nothing of it left behind."""
