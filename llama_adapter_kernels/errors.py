"""The exception for what a user can put right, and what is wrong with a text."""


class UserError(Exception):
    """A mistake in arguments, data or files. The command line prints the message and exits with code 2."""


def text_problem(text: str) -> str | None:
    """Why no tokenizer can read `text`; None where one can.

    Half of a surrogate pair is what JSON's \\ud83d alone gives, or a byte that is not UTF-8 on a command line.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start]).strip("'")
        return f"expected text, got a lone surrogate ({found}) at character {error.start + 1}"
    return None
