"""Export for Qualcomm's HTP: a decoder of fixed shapes in QDQ form, and its compiled context."""
