from tests.helpers import shapes  # noqa: F401 - pytest names it to jaxtyping before any test is imported
