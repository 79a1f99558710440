"""The pass that gives an artifact its eyes: encoder, embedding, and how pictures are prepared."""
