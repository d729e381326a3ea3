"""What a detector costs, and where its attention acts."""
