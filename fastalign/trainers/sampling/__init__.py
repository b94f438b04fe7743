"""What algorithms that sample from the policy share."""
