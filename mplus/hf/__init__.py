"""All contact with transformers and peft: wrapping, reading, generating, saving.

Importing it registers the Auto classes.
"""

from mplus.hf.auto import MPlusForCausalLM, MPlusModelConfig, register_auto_classes
from mplus.hf.saving import from_pretrained
from mplus.hf.wrapping import unwrap, wrap

__all__ = ["MPlusForCausalLM", "MPlusModelConfig", "from_pretrained", "unwrap", "wrap"]

register_auto_classes()
