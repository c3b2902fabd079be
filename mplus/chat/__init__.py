"""Chat sessions: messages in, streamed answers out, and what leaves the prompt goes into memory."""

from mplus.chat.answer import Answer
from mplus.chat.chat import Chat
from mplus.chat.exchange import Exchange, Turn
from mplus.chat.reply import Recalled, Reply

__all__ = ["Answer", "Chat", "Exchange", "Recalled", "Reply", "Turn"]
