"""What the Space does behind its page, without gradio: limits, checks, jobs in processes of their own, HTML."""
