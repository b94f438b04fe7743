"""Data: rows of any format to checked examples to token ids, with every fault located."""

from fastalign.data.conversation import Message, content_as_json
from fastalign.data.examples import (
    Content,
    Example,
    PreferenceExample,
    PromptExample,
    SFTExample,
    Votes,
)
from fastalign.data.load import (
    PromptDataset,
    TokenizedDataset,
    load_preferences,
    load_prompts,
    load_sft,
)
from fastalign.data.read import load_samples, read_examples, read_samples, read_texts
from fastalign.data.readers.row import DataFault
from fastalign.data.report import DataReport
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import (
    Tokenizer,
    added_tokens_line,
    check_same_vocabulary,
    check_token_meanings,
    eos_token_ids,
    foreign_ids_line,
    load_tokenizer,
    num_foreign_ids,
    template_clock,
    use_distinct_pad,
)

__all__ = [
    "Content",
    "DataFault",
    "DataReport",
    "Encoder",
    "Example",
    "Message",
    "PreferenceExample",
    "PromptDataset",
    "PromptExample",
    "SFTExample",
    "TokenizedDataset",
    "Tokenizer",
    "Votes",
    "added_tokens_line",
    "check_same_vocabulary",
    "check_token_meanings",
    "content_as_json",
    "eos_token_ids",
    "foreign_ids_line",
    "load_preferences",
    "load_prompts",
    "load_samples",
    "load_sft",
    "load_tokenizer",
    "num_foreign_ids",
    "read_examples",
    "read_samples",
    "read_texts",
    "template_clock",
    "use_distinct_pad",
]
