"""A page in the browser: photos and a prompt in, the edited picture out, on the reference tokens that matter."""
