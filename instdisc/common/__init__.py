"""What programs and rooms share: errors, seeds."""
