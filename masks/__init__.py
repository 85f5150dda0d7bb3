"""Where the blocks lie and which of them each query attends to."""
