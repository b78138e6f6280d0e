"""What the reward model reads: prompt, response up to its stop sequence, EOS; as ids of its own vocabulary.

Ids are passed on as they were sampled where both models share a vocabulary and the cut falls between two tokens.
Else the text is encoded anew, as ordinary characters only: a policy that spells out "<|endoftext|>" must not be
able to choose where its reward is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.data.tokens import encode, encode_pair, end_id
from pipeline.training.decode import Response
from pipeline.training.stopping import StopSequences, decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoringText:
    """Turns responses into sequences for the reward model, at most `max_length` ids; prompts lose their beginning."""

    policy: PreTrainedTokenizerBase
    reward: PreTrainedTokenizerBase
    same_vocabulary: bool
    stops: StopSequences
    max_length: int

    def text(self, response: Response) -> str:
        """The response as a person reads it: without EOS, cut before its stop sequence and then right-stripped."""
        if response.finish == "eos":
            return decode_text(self.policy, response.tokens[:-1])
        text = decode_text(self.policy, response.tokens)
        if response.finish == "length":
            return text
        place = self.stops.find(text)
        assert place is not None, "a response that stopped holds its stop sequence"
        return text[:place].rstrip()

    def sequence(self, prompt: str, response: Response) -> list[int]:
        """Ids to score. They always end with EOS, where the reward model learnt to judge, however the response ended;
        the score is read at this explicit last id, so a response without an EOS is never read at index 0."""
        ids = [*self._response_ids(response), end_id(self.reward)][-self.max_length :]
        room = self.max_length - len(ids)
        prompt_ids = encode(self.reward, prompt)
        return prompt_ids[max(0, len(prompt_ids) - room) :] + ids

    def answer(self, prompt: str, answer: str) -> list[int]:
        """Ids to score for an answer of the data set."""
        prompt_ids, ids = encode_pair(self.reward, prompt, answer, self.max_length)
        return prompt_ids + ids

    def _response_ids(self, response: Response) -> list[int]:
        """The response in the reward model's ids, without EOS and stop sequence."""
        text = self.text(response)
        if not self.same_vocabulary:
            return encode(self.reward, text)
        if response.finish == "length":
            return response.tokens
        if response.finish == "eos":
            return response.tokens[:-1]
        for length in range(len(response.tokens) - 1, -1, -1):
            head = decode_text(self.policy, response.tokens[:length])
            if head == text:
                return response.tokens[:length]
            if len(head) < len(text):
                break
        return encode(self.reward, text)
