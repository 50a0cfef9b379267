"""Stand-in for torchaudio: importable, so that LLaMA-Factory starts, and of no other use."""

__version__ = "2.11.0+stub"


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module 'torchaudio' has no attribute '{name}'")
    raise RuntimeError(
        f"torchaudio.{name}: only a stand-in for torchaudio is installed here; "
        "for audio data install the torchaudio that matches this torch"
    )
