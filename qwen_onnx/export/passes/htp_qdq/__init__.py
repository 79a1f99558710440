"""``HtpQdqExport``: graphs of fixed shapes in QDQ form for Qualcomm's HTP."""
