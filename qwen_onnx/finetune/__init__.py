"""From a file of examples to an adapter: peft and trl train, and what they need is checked before they start."""
