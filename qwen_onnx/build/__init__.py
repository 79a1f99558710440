"""The main job: from a plan to a proven artifact."""
