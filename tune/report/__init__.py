"""What a finished search says: its page, drawings and the importance of its keys."""
