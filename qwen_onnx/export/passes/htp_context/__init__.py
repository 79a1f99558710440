"""``HtpContext``: contexts compiled for Qualcomm's HTP."""
