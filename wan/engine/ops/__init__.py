"""Operations the networks are written in. Each has a plain PyTorch body that defines it and runs everywhere."""
