"""All contact with transformers and peft: wrapping, reading, generating, saving.

Importing it registers the Auto classes.
"""

from mplus.hf.model.wrapping import unwrap, wrap
from mplus.hf.pretrained.config import MPlusModelConfig
from mplus.hf.pretrained.load import MPlusForCausalLM, from_pretrained, register_auto_classes

__all__ = ["MPlusForCausalLM", "MPlusModelConfig", "from_pretrained", "unwrap", "wrap"]

register_auto_classes()
