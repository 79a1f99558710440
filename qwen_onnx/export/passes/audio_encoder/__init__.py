"""The pass that gives an artifact its ears: encoder, embedding, and how sounds are prepared."""
