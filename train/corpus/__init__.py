"""From files of raw text to clean documents: what train/prepare.py does before it tokenizes."""
