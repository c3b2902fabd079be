"""KvReads: which chunks a text reads, and where in it they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor, nn

from mplus.backends.base import Segment
from mplus.config import MPlusConfig
from mplus.errors import InputError
from mplus.mechanisms.base import MemoryMechanism
from mplus.mechanisms.decoder import Decoder, Project, Text
from mplus.mechanisms.kv.asked import Asked, ChosenChunks
from mplus.mechanisms.kv.calibration import Calibrations
from mplus.mechanisms.kv.chat import ChatFormat
from mplus.mechanisms.kv.front import Front
from mplus.mechanisms.kv.prompt import Prompt
from mplus.mechanisms.kv.retrieval import Retrieval
from mplus.mechanisms.kv.state import KvState, state_of
from mplus.mechanisms.opened import Insertion, Opened, Retrieved
from mplus.memory.sources.found import FoundText
from mplus.memory.state import StreamView
from mplus.memory.writing.update import check_finite
from mplus.retrievers.chunks import CHUNK_RETRIEVERS
from mplus.rows import MemoryRows
from mplus.stores.base import StoreView
from mplus.tokenizer import Tokenizer

NOTHING = ChosenChunks(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))


@define(frozen=True, eq=False)
class ReadChunks:
    """The chunks that a text reads.

    Attributes:
        front: the rows of all blocks, one behind the other.
        blocks: of each stream, the chunks of each block, in the order in which they are read.
    """

    front: Front
    blocks: Sequence[Sequence[ChosenChunks]]

    @cached_property
    def tokens(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The places, scores and chunks of each stream's tokens, ``[n]`` each, in the order in which they are read."""
        found = []
        for view, places, blocks in zip(self.front.views, self.front.places, self.blocks, strict=True):
            chunks = torch.cat([block.chunks for block in blocks])
            lengths = state_of(view).chunk_length[chunks]
            scores = torch.cat([block.scores for block in blocks])
            found.append((places, scores.repeat_interleave(lengths), chunks.repeat_interleave(lengths)))
        return found


class KvReads(MemoryMechanism):
    """The reading half of the memory of keys and values: ``[begin | retrieved chunks | rest of the text]``.

    The begin is what the text has in front of its last user's turn; in a text without turns the tokens that every text
    begins with, or, where it lacks them, the rows that the memory keeps of them.
    """

    retrieves_in_open, takes_min_score = True, True

    def __init__(self, config: MPlusConfig, additions: nn.Module, options: Any) -> None:
        super().__init__(config, additions, options)
        self.chunk_retriever = CHUNK_RETRIEVERS.build(config.retriever)
        self.calibrations = Calibrations(self.chunk_retriever, config.retriever, options.rerank > 1)
        self.retrieval = Retrieval(
            retriever=self.chunk_retriever,
            chunks=options.retrieved_chunks,
            min_score=options.min_score if config.min_score is None else config.min_score,
            rerank=options.rerank,
            likelihood=options.likelihood,
        )

    def open(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> Opened:
        """Choose the chunks that this text reads: as many as the decoder has positions for, those of an answer left."""
        if not any(map(self.has_prefix, views)):
            return Opened(views)
        for view in views:
            state_of(view).check_store(view)
        prompts = self._prompts(decoder, views, text)
        rows = list(zip(views, prompts, ((),) * len(views), strict=True))
        blocks = [[found] for found in self._chosen(decoder, text, rows)]
        opened = self._opened(decoder, views, blocks, torch.tensor([[prompt.begin] for prompt in prompts]))
        if text.reopens and opened.insertion is not None:
            most = [self._most(decoder, text, *row) for row in rows]
            return evolve(opened, insertion=_with_room(opened.insertion, most))
        return opened

    def reopen(self, decoder: Decoder, opened: Opened, text: Text, rows: Sequence[int]) -> Opened:
        """Exchange the chunks of ``rows``, at the last place where any were chosen, for what the text now brings back.

        Text stays where it is, and the new chunks end in front of it, as if they had been there all along. Where other
        text stands in front of them they take no more positions than were kept free for them; none, where the first
        choice found nothing.
        """
        if opened.insertion is None:
            return opened
        prompts = self._prompts(decoder, opened.views, evolve(text, limited=True))
        blocks = [list(own) for own in opened.own.blocks]
        asked = [(opened.views[row], prompts[row], blocks[row][:-1]) for row in rows]
        rooms, in_front = opened.insertion.rooms[:, -1].tolist(), opened.insertion.tokens[:, -1].tolist()
        free = [rooms[row] if in_front[row] else None for row in rows]
        for row, found in zip(rows, self._chosen(decoder, text, asked, free), strict=True):
            blocks[row][-1] = found
        return self._opened(decoder, opened.views, blocks, opened.insertion.tokens, opened.insertion.rooms)

    def resume(self, decoder: Decoder, opened: Opened, text: Text, read: Tensor) -> Opened:
        """Bring back further chunks in front of the content of a new user's turn, none of those that were read.

        Where the text was cut (``cache.crop``) the chunks of turns that are gone go with them.
        """
        if opened.insertion is None:
            return opened
        views, prompts = opened.views, self._prompts(decoder, opened.views, text)
        before, blocks, whole = _as_far_as(opened.insertion, opened.own.blocks, read)
        tokens, last = torch.maximum(before.tokens[:, -1], read), before.tokens[:, -1].tolist()
        anew = [
            row
            for row, prompt in enumerate(prompts)
            if text.queries is not None or (prompt.is_chat and prompt.begin > last[row])
        ]
        found = self._chosen(decoder, text, [(views[row], prompts[row], blocks[row]) for row in anew])
        chosen = dict(zip(anew, found, strict=True))
        for row, prompt in enumerate(prompts):
            blocks[row].append(chosen.get(row, NOTHING))
            if row in chosen:
                tokens[row] = max(int(tokens[row]), prompt.begin)
        if whole and not any(len(own[-1].chunks) for own in blocks):
            return opened
        taken = [[len(state_of(view).places(own[-1].chunks))] for view, own in zip(views, blocks, strict=True)]
        for row in anew if text.reopens else ():
            most = self._most(decoder, text, views[row], prompts[row], blocks[row][:-1])
            taken[row][0] = max(taken[row][0], most if taken[row][0] else 0)
        room = torch.cat([before.rooms, torch.tensor(taken)], 1)
        return self._opened(decoder, views, blocks, torch.cat([before.tokens, tokens[:, None]], 1), room)

    def _prompts(self, decoder: Decoder, views: Sequence[StreamView], text: Text) -> list[Prompt]:
        first = () if decoder.shape.first_token is None else (decoder.shape.first_token,)
        found = []
        for row, view in enumerate(views):
            state = state_of(view)
            opening, closing = state.opening_ids.tolist(), state.closing_ids.tolist()
            chat = ChatFormat((), tuple(opening), tuple(closing)) if opening else None
            begins = (self._begin_ids(state, decoder.shape.first_token).tolist(), first)
            found.append(Prompt.of(text, row, chat, begins))
        return found

    def _chosen(
        self,
        decoder: Decoder,
        text: Text,
        rows: Sequence[tuple[StreamView, Prompt, Sequence[ChosenChunks]]],
        free: Sequence[int | None] = (),
    ) -> list[ChosenChunks]:
        """Return what prompts bring back, in the order in which it is read.

        Args:
            decoder: that reads it.
            text: that the prompts are rows of.
            rows: of each prompt its stream, the prompt, and what it reads already, which is not brought back again.
            free: of each, the positions that what comes back may take; None: as many as the decoder has.
        """
        asked = {place: self._asked(decoder, text, *row) for place, row in enumerate(rows) if self.has_prefix(row[0])}
        for place, room in enumerate(free):
            if place in asked and room is not None:
                asked[place] = evolve(asked[place], room=min(asked[place].room, room))
        asking = {p: one for p, one in asked.items() if len(one.question) and not state_of(one.view).reads_all}
        retrieval = self.retrieval if text.min_score is None else evolve(self.retrieval, min_score=text.min_score)
        found = dict(zip(asking, retrieval.choose(decoder, list(asking.values()), text.tokenizer), strict=True))
        return [self._in_order(view, found.get(place)) for place, (view, _, _) in enumerate(rows)]

    def _asked(
        self, decoder: Decoder, text: Text, view: StreamView, prompt: Prompt, read: Sequence[ChosenChunks]
    ) -> Asked:
        state, room = state_of(view), self._room(decoder, text, view, prompt, read)
        taken = state.places(torch.cat([NOTHING.chunks, *(block.chunks for block in read)]))
        known = torch.cat([prompt.known, state.token_ids[taken].long()])
        with torch.no_grad():
            (begins,) = self._begins(decoder, [state])
        return Asked(view, begins, prompt.query, known, room)

    def _room(
        self, decoder: Decoder, text: Text, view: StreamView, prompt: Prompt, read: Sequence[ChosenChunks]
    ) -> int:
        """Return how many tokens may come back for a prompt, beside what it reads already."""
        state = state_of(view)
        most, room = decoder.shape.max_positions, self.config.retrieved_tokens
        if most is None:
            return room
        taken = sum(int(state.chunk_length[block.chunks].sum()) for block in read)
        begin = 0 if prompt.begin else len(self._begin_ids(state, decoder.shape.first_token))
        return min(room, most - len(prompt.ids) - text.further - begin - taken)

    def _most(
        self, decoder: Decoder, text: Text, view: StreamView, prompt: Prompt, read: Sequence[ChosenChunks]
    ) -> int:
        """Return how many tokens any choice for a prompt could bring back."""
        lengths, chunks = state_of(view).chunk_length, self.options.retrieved_chunks
        longest = lengths.sort(descending=True).values[:chunks]
        return max(min(int(longest.sum()), self._room(decoder, text, view, prompt, read)), 0)

    def attended_rows(self, view: StreamView) -> int:
        """Return the tokens of the longest chunks that one read could bring back."""
        longest = state_of(view).chunk_length.sort(descending=True).values[: self.options.retrieved_chunks]
        return min(int(longest.sum()), self.config.retrieved_tokens)

    def _in_order(self, view: StreamView, found: ChosenChunks | None) -> ChosenChunks:
        """Return what was found in the order in which it is read; None: nothing was looked for."""
        state = state_of(view)
        if found is None:
            every = torch.arange(len(state.chunk_length) if state.reads_all else 0)
            return ChosenChunks(every, torch.zeros(len(every), dtype=torch.float64))
        written = self.options.order == "written"
        order = found.chunks.argsort() if written else torch.arange(len(found.chunks)).flip(0)
        if view.access_log is not None:
            ids = view.store.ids(0)
            view.access_log.record(0, ids[state.places(found.chunks[order]).to(ids.device)], state.clock)
        return found.at(order)

    def calibrations_known(self) -> dict[str, Tensor]:
        return dict(self.calibrations.known)

    def take_calibrations(self, known: Mapping[str, Tensor]) -> None:
        self.calibrations.known.update(known)

    def save_retriever(self, folder: Path) -> Mapping[str, str]:
        return self.chunk_retriever.save_files(folder)

    def search(
        self, decoder: Decoder, view: StreamView, text: str, k: int, tokenizer: Tokenizer | None
    ) -> list[FoundText]:
        """Return the chunks that ``text`` brings back, scored as in a read, whatever their length."""
        if tokenizer is None:
            raise InputError("a search needs a tokenizer: pass tokenizer= to new_memory, load or open")
        state = state_of(view)
        question = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if not state.tokens or not len(question):
            return []
        with torch.no_grad():
            (begin,) = self._begins(decoder, [state])
        retrieval = evolve(self.retrieval, chunks=k)
        (found,) = retrieval.choose(decoder, [Asked(view, begin, question, question[:0], state.tokens)], tokenizer)
        pieces, sources = state.token_ids.split(state.chunk_length.tolist()), state.chunk_source.tolist()
        return [
            FoundText.of(state, sources[chunk], score, str(tokenizer.decode(pieces[chunk], skip_special_tokens=True)))
            for chunk, score in zip(found.chunks.tolist(), found.scores.tolist(), strict=True)
        ]

    def _opened(
        self,
        decoder: Decoder,
        views: Sequence[StreamView],
        blocks: Sequence[Sequence[ChosenChunks]],
        tokens: Tensor,
        room: Tensor | None = None,
    ) -> Opened:
        """Return what is read of each stream: its ``blocks``, behind so many ``tokens`` ``[B, k]`` of the text each."""
        states = list(map(state_of, views))
        # Where the text has no begin of its own the rows that the memory keeps of one go in front of its chunks.
        alone = [not int(first) and len(own[0].chunks) > 0 for first, own in zip(tokens[:, 0], blocks, strict=True)]
        with torch.no_grad():  # of what was written without a graph; in training, writing keeps its own
            kept = self._begins(decoder, states) if any(alone) else [state.begin_rows for state in states]
        begins = [rows if own else rows[:, :0] for rows, own in zip(kept, alone, strict=True)]
        places = [[state.places(block.chunks) for block in own] for state, own in zip(states, blocks, strict=True)]
        rows = torch.tensor([[len(block) for block in own] for own in places])
        # The begin is read with the first block, in front of it.
        rows[:, 0] += torch.tensor([begin.shape[1] for begin in begins])
        insertion = Insertion(tokens, rows, room)
        front = Front(decoder.kept, views, [torch.cat(own) for own in places], begins, insertion)
        settled = None
        if decoder.shape.positions == "learned":
            settled = "its rows sit at positions 0, 1, ... and the text behind them, so others cannot take their place"
        return Opened(views, own=ReadChunks(front, blocks), settled=settled, insertion=insertion)

    def prefix(
        self, opened: Opened, layer: int, found: Sequence[Retrieved | None], hidden: Tensor, project: Project
    ) -> tuple[Segment, ...] | None:
        return None if opened.own is None else opened.own.front.segments(layer, hidden)

    def retrieved(self, opened: Opened, layer: int) -> list[Retrieved | None]:
        """Return the tokens of the chunks that were chosen, in the order in which they are read."""
        found: list[Retrieved | None] = [None] * len(opened.views)
        for stream in range(0 if opened.own is None else len(opened.views)):
            store, (places, scores, units) = opened.views[stream].store, opened.own.tokens[stream]
            if not len(places):
                continue
            ids = store.ids(layer)
            where = places.to(ids.device)
            found[stream] = Retrieved(_without_keys(store, layer, ids, where), ids[where], scores, units=units)
        return found

    def has_prefix(self, view: StreamView) -> bool:
        return state_of(view).tokens > 0

    def prefix_rows(self, view: StreamView) -> int:
        """Return the most rows that a text can bring back, and the begin rows."""
        state = state_of(view)
        tokens = min(state.tokens, self.config.retrieved_tokens)
        return tokens + len(self._begin_ids(state, 0)) if tokens else 0

    def _begins(self, decoder: Decoder, states: Sequence[KvState]) -> list[Tensor]:
        """Return ``[L, b, w]``, the rows that the chunks of each stream are behind; computed where it has none yet."""
        made: dict[tuple[int, ...], Tensor] = {}
        found = []
        for state in states:
            ids = self._begin_ids(state, decoder.shape.first_token)
            key = tuple(ids.tolist())
            if state.begin_rows.shape[1] or not key:
                found.append(state.begin_rows)
                continue
            # Streams that begin alike, as all of one decoder mostly do, share the pass.
            if key not in made:
                text = ids[None].to(decoder.shape.device, torch.int64)
                layers = decoder.run(text, adapter="write", collect={"projected"}).projected
                made[key] = torch.stack([rows[0] for rows in layers])
                check_finite(made[key], "in keys and values of what chunks are written behind")
            found.append(made[key])
        return found

    def _begin_ids(self, state: KvState, first_token: int | None) -> Tensor:
        """Return ``[b]`` int32, the tokens that the chunks of a stream are behind."""
        if len(state.begin_ids):
            return state.begin_ids
        first = () if first_token is None else (first_token,)
        return torch.tensor(first if self.options.begin is None else self.options.begin, dtype=torch.int32)


def _without_keys(store: StoreView, layer: int, ids: Tensor, places: Tensor) -> MemoryRows:
    """Return the rows at ``places`` of a layer whose ``ids`` are given, without their keys and values."""
    together = store.content(layer, "projected") is not None and not store.layout.extra
    birth = store.column(layer, "birth") if together else None
    source = store.column(layer, "source") if together else None
    if birth is not None and source is not None:
        return MemoryRows(None, birth.index_select(0, places), source.index_select(0, places))
    return store.gather(layer, ids[places], leave_out=("key", "expiry", "projected")).replace(projected=None)


def _with_room(insertion: Insertion, most: Sequence[int]) -> Insertion:
    """Return an insertion of one block with so many positions free where text stands in front, and something was found.

    Its rows end where these do.
    """
    wanted = torch.tensor(most)[:, None]
    grows = (insertion.tokens > 0) & (insertion.rows > 0)
    return evolve(insertion, room=torch.where(grows, torch.maximum(insertion.rows, wanted), insertion.rows))


def _as_far_as(
    insertion: Insertion, blocks: Sequence[Sequence[ChosenChunks]], read: Tensor
) -> tuple[Insertion, list[list[ChosenChunks]], bool]:
    """Return the places and chunks of a text without those behind its first ``read`` ``[B]`` tokens.

    The third result is whether all are left.
    """
    left = insertion.tokens <= read[:, None]
    left[:, 0] = True  # what a first prompt reads may stand behind all of it
    kept = [
        [block if own else NOTHING for block, own in zip(row, rows, strict=True)]
        for row, rows in zip(blocks, left.tolist(), strict=True)
    ]
    tokens = torch.where(left, insertion.tokens, read[:, None])
    return Insertion(tokens, insertion.rows * left, insertion.rooms * left), kept, bool(left.all())
