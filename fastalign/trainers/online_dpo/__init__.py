"""Online DPO."""
