"""Child processes and the interpreters of other environments."""
