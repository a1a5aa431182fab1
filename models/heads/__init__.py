"""What results are made of: codes, photos, tuned weights, and the heads that they make."""
