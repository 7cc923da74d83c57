"""What `layers.py` is to bitsandbytes' 4-bit layers. Imported where bitsandbytes is installed."""

from peft.tuners.lora.bnb import Linear4bit

from .layers import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's `lora.Linear4bit` over a bitsandbytes `Linear4bit`."""

    def _get_name(self) -> str:
        return "Linear4bit"
