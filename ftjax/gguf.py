"""GGUF files."""
class GgufFile:
    kind = "gguf"
    def __init__(self, path, source): raise NotImplementedError
