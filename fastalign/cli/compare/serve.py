"""`fastalign compare`: fill the database, print the links, and serve the page."""

import ipaddress
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastalign.cli.compare.settings import ChatConfig, CompareConfig
from fastalign.cli.settings import Side, WinRateConfig, WinRateData
from fastalign.compare.access import Keys
from fastalign.compare.labelling import Choice, Labelling
from fastalign.compare.page import Pages
from fastalign.compare.pairs import model_pairs, read_pairs
from fastalign.compare.results import results
from fastalign.compare.store import Annotator, Store
from fastalign.data.readers.files import data_format

if TYPE_CHECKING:
    from fastalign.compare.app import Served, Site, Watcher
    from fastalign.evaluation.win_rate import AnswerPair

OWNER = "(results)"  # no name of a person: see names_of
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def names_of(text: str) -> list[str]:
    """Return the names of `--annotators`.

    Raises:
        ValueError: if there is none, one is there twice, or one has no letter or digit.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name or len(name) > 60 or not name[0].isalnum():
            raise ValueError(f"annotators: expected names with commas between, got {text!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"annotators: expected each name once, got {text!r}")
    return names


def is_loopback(host: str) -> bool:
    """Return whether an address is reached by this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """Return a host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def host_names(config: CompareConfig | ChatConfig) -> list[str]:
    """Return the names by which the page may be asked for.

    A name of somebody else's that leads to this machine (DNS rebinding) is not among them.

    Raises:
        ValueError: if other machines can reach the page, and no name is given.
    """
    server = config.server
    names = [bracketed(name) for name in (*LOOPBACK_NAMES, *server.names)]
    if is_loopback(server.host):
        return names
    if server.host not in ("0.0.0.0", "::"):
        return [*names, bracketed(server.host)]
    if not server.names:
        raise ValueError(
            f"server.host: {server.host} is every address of this machine; --server.names gives "
            "the names or addresses by which people call it"
        )
    return names


def fill(store: Store, config: CompareConfig) -> None:
    """Add the pairs of the files and of the two models to the database.

    Raises:
        ValueError: if there is no pair.
    """
    for source in config.files:
        pairs, lines = read_pairs(source, config.data.pairs_per_prompt, config.run.seed)
        print("".join(f"{line}\n" for line in lines), end="")
        print(f"{source}: {len(pairs)} pairs, {store.add_pairs(pairs)} of them new")
    if config.a is not None and config.b is not None:
        pairs = model_pairs(sampled_answers(config), (config.a, config.b))
        same = sum(pair.response_a == pair.response_b for pair in pairs)
        print(
            f"{len(pairs)} pairs of {config.a} and {config.b}, {store.add_pairs(pairs)} of them "
            f"new, {same} with equal answers, which count as ties"
        )
    if all(pair.identical for pair in store.pairs()):
        raise ValueError(
            f"{config.out}: expected pairs of different answers, found none; `fastalign compare "
            "FILE` adds those of a file of samples"
        )


def sampled_answers(config: CompareConfig) -> list["AnswerPair"]:
    """Return the pairs of the two models' answers, read from files or sampled."""
    from fastalign.cli.answers.win_rate import answers_of  # seconds of imports
    from fastalign.evaluation.win_rate import pair_answers

    sides = []
    for name, given in (("a", str(config.a)), ("b", str(config.b))):
        if data_format(Path(given)) is not None:
            sides.append(Side(samples=given))
        elif config.data.prompts is None:
            raise ValueError(f"data.prompts: the model --{name} needs prompts, got none")
        else:
            sides.append(Side(given, None, config.trust_remote_code, config.device))
    asked = WinRateConfig(
        model=sides[0],
        baseline=sides[1],
        out="",
        data=WinRateData(config.data.prompts),
        sampling=config.sampling,
        sampler=config.sampler,
        vllm=config.vllm,
        run=config.run,
    )
    ours, theirs = (answers_of(side, asked) for side in sides)
    return pair_answers(ours.texts, theirs.texts)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        ValueError: if it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()  # whoever opens a link before the server runs, waits for it
    except OSError as error:
        found.close()
        raise ValueError(
            f"server.port: {host} port {port}: {error.strerror or error}; --server.port 0 takes "
            "any that is free"
        ) from None
    return found


def print_links(config: CompareConfig | ChatConfig, port: int, keys: Keys) -> None:
    """Print each person's link.

    They are secrets that have to be seen, so they go around the stream that masks secrets.
    """
    name = bracketed(config.server.names[0] if config.server.names else config.server.host)
    stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    for person in keys.annotators:
        who = f"{person.name}: " if len(keys.annotators) > 1 else ""
        stream.write(f"{who}http://{name}:{port}/?key={person.key}\n")
    if keys.owner not in keys.annotators:
        stream.write(f"results: http://{name}:{port}/?key={keys.owner.key}\n")
    stream.flush()


def opened_socket(config: CompareConfig | ChatConfig) -> "closing[socket.socket]":
    """Return a socket at the page's address, with everything that the page needs installed.

    Raises:
        ValueError: if a package is missing, or the address cannot be listened at.
    """
    host_names(config)
    for package in ("starlette", "uvicorn", "krippendorff"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install 'fastalign[compare]'")
    return closing(bound_socket(config.server.host, config.server.port))


def main(config: CompareConfig) -> int:
    """Run the command until it is interrupted; return 0."""
    names, hosts = names_of(config.annotators), host_names(config)
    with opened_socket(config) as listening:
        store = Store(config.out, create=bool(config.files or config.a))
        with closing(store), store.only_writer():
            fill(store, config)
            people = [store.annotator(name) for name in names]
            owner = people[0] if len(people) == 1 else store.annotator(OWNER)
            labelling = Labelling(store, people, choice_of(config))
            with watchers_of(config, store, labelling) as watchers:
                served = served_of(config, labelling, (people, owner, watchers))
                serve(config, served, listening, hosts)
            progress = f"fastalign compare export {config.out} --out pairs.jsonl"
            print(f"{len(store.votes())} votes in {config.out}; {progress} writes them")
    return 0


def choice_of(config: CompareConfig) -> Choice:
    """Return how the next pair is chosen."""
    return Choice(
        votes_per_pair=config.choice.votes_per_pair,
        repeat_share=config.choice.repeat_share,
        random_share=config.choice.random_share,
        seed=config.run.seed,
    )


@contextmanager
def watchers_of(
    config: CompareConfig, store: Store, labelling: Labelling
) -> Iterator[list["Watcher"]]:
    """Yield the learner of `--reward`, fitted once; without the option, nothing."""
    if config.reward is None:
        yield []
        return
    from fastalign.compare.features import pair_features
    from fastalign.compare.learner import Learner
    from fastalign.compute import Compute, find_device

    asked = [pair for pair in labelling.pairs.values() if not pair.identical]
    print(f"reading {len(asked)} pairs with {config.reward}")
    compute = Compute(find_device(config.device, "device"))
    trust = config.trust_remote_code
    try:
        features = pair_features(config.reward, asked, compute, trust_remote_code=trust)
    except ValueError as error:  # the option is --reward, not model.path
        raise ValueError(f"reward: {str(error).removeprefix('model.path: ')}") from error
    if features.unread:
        print(
            f"{len(features.unread)} pairs are too long for {config.reward} or have the same "
            "tokens: they are shown at random alone"
        )
    with ThreadPoolExecutor(1) as executor:
        learner = Learner(store, labelling, features, config.choice.refit_every, executor)
        learner.fit()
        yield [learner]


def served_of(
    config: CompareConfig,
    labelling: Labelling,
    known: tuple[Sequence[Annotator], Annotator, Sequence["Watcher"]],
) -> "Served":
    """Return the parts of the application; `known` are annotators, owner and watchers."""
    from fastalign.compare.app import Served, VoteWriter

    people, owner, watchers = known
    pages = Pages(config.page.title, markdown=config.page.markdown)
    return Served(
        labelling=labelling,
        writer=VoteWriter(labelling.store, labelling.take),
        pages=pages,
        keys=Keys(people, owner),
        results=results_page(config.out, pages),
        watchers=watchers,
    )


def results_page(path: str, pages: Pages) -> Callable[[], str]:
    """Return a function that renders the results of a database, on any thread."""

    def render() -> str:
        with closing(Store(path)) as store:  # of its own thread
            return pages.results(results(store), {pair.id: pair for pair in store.pairs()})

    return render


def serve(
    config: CompareConfig | ChatConfig,
    site: "Site",
    listening: socket.socket,
    hosts: Sequence[str],
    ending: str = "Ctrl-C ends it; votes are kept as they come",
) -> None:
    """Print the links, and serve the page until SIGINT; `ending` says what that does."""
    import uvicorn

    from fastalign.compare.app import application

    port = listening.getsockname()[1]
    if not is_loopback(config.server.host):
        print(
            "server.host: other machines can reach this page; keys, answers and votes travel over "
            "plain HTTP: put a proxy with TLS in front of it outside of a network that you trust"
        )
    print_links(config, port, site.keys)
    print(ending)
    options = uvicorn.Config(
        application(site, hosts, port),
        log_level="warning",
        access_log=False,  # its lines would hold the keys
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(options).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has stopped, and passes the signal on
        print()
