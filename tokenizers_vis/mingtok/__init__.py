"""MingTok: one continuous tokenizer for generation and understanding."""
