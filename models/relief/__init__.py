"""Shape, albedo, view and light of pictures without any label: the networks, and what pictures are drawn for them."""
