"""From text to token ids and back: tokenizer, chat template, reasoning, tool calls."""
