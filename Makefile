# Installs turnstile: `make && sudo make install`; `make deb` makes a Debian package. Tests: tests/run.
# `make musl` builds for musl what `install` and `deb` then install, too: libturnstile-musl.so, for programs on musl, and
# turnstile-static, the same program in one file that needs no library. `make install-musl` installs these two alone, for
# a root without glibc (Alpine's).
#
#   PREFIX=/usr/local      where to. SQLite finds the extension as `libturnstile` below /usr and /usr/local
#   DESTDIR=               put in front of every path, for packages; nothing outside of it is touched then
#   SYSTEMD=yes            also unit, socket unit and user of the host's broker; `no` leaves them out
#   TARGET=target/release  what is installed; a build that is there already is not built again with BUILD=no
#   MUSL_CC=musl-gcc       a C compiler for musl; on a machine that runs on musl: cc

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
DATADIR ?= $(PREFIX)/share
MANDIR ?= $(DATADIR)/man
DOCDIR ?= $(DATADIR)/doc/turnstile
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
BASHDIR ?= $(DATADIR)/bash-completion/completions
ZSHDIR ?= $(DATADIR)/zsh/site-functions
FISHDIR ?= $(DATADIR)/fish/vendor_completions.d
SYSTEMD ?= yes
TARGET ?= target/release
BUILD ?= yes
CARGO ?= cargo
INSTALL ?= install

MUSL_CC ?= musl-gcc
MUSL_TARGET ?= $(shell uname -m)-unknown-linux-musl
# As cargo reads it: CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_...
MUSL_VARIABLE = CARGO_TARGET_$(shell echo $(MUSL_TARGET) | tr a-z- A-Z_)
MUSL_BUILT = $(dir $(TARGET))$(MUSL_TARGET)/release
MUSL_PROGRAM = $(TARGET)/turnstile-static
MUSL_LIBRARY = $(TARGET)/libturnstile-musl.so
# The processors' names that glibc puts for $PLATFORM, and that word itself, which is what musl looks for
# (src/cli/extension.rs).
PLATFORMS ?= $(shell uname -m) $(if $(filter x86_64,$(shell uname -m)),haswell xeon_phi)
DOLLAR = $$

PROGRAM = $(TARGET)/turnstile
LIBRARY = $(TARGET)/libturnstile.so
# Man pages, completions and the unit with this PREFIX, made by the program itself.
GENERATED = $(TARGET)/packaging

.PHONY: all build musl generated install install-musl uninstall deb
all: build

build:
ifeq ($(BUILD),yes)
	$(CARGO) build --release --lib --bins
endif

# Rust links everything statically for musl, or nothing; an extension cannot be static. build.rs sees to the program.
musl:
ifeq ($(BUILD),yes)
	@command -v $(MUSL_CC) >/dev/null || { echo "$(MUSL_CC) is missing: apt install musl-tools (Debian, Ubuntu)" >&2; exit 1; }
	@test -d "$$(rustc --print target-libdir --target $(MUSL_TARGET))" || \
	    { echo "Rust has no library for it: rustup target add $(MUSL_TARGET)" >&2; exit 1; }
	$(MUSL_VARIABLE)_LINKER=$(MUSL_CC) $(MUSL_VARIABLE)_RUSTFLAGS="-C target-feature=-crt-static" \
	    $(CARGO) build --release --lib --bins --target $(MUSL_TARGET) --target-dir $(dir $(TARGET))
	mkdir -p $(TARGET)
	cp -f $(MUSL_BUILT)/turnstile $(MUSL_PROGRAM)
	cp -f $(MUSL_BUILT)/libturnstile.so $(MUSL_LIBRARY)
	$(call both_names,$(TARGET))
endif

# One name for the two libraries of a directory, of which each dynamic linker takes its own. (Not "libturnstile.d": a file of
# that name is Cargo's.)
define both_names
	for platform in $(PLATFORMS); do \
	    mkdir -p "$(1)/libturnstile.both/$$platform" && \
	    ln -sfn ../../libturnstile.so "$(1)/libturnstile.both/$$platform/libturnstile.so" || exit 1; done
	mkdir -p '$(1)/libturnstile.both/$(DOLLAR)PLATFORM'
	ln -sfn ../../libturnstile-musl.so '$(1)/libturnstile.both/$(DOLLAR)PLATFORM/libturnstile.so'
endef

# In a new file and renamed over the old one: programs have that one mapped.
define replace
	$(INSTALL) -m $(1) $(2) $(3).new
	mv -f $(3).new $(3)
endef

generated: build
	rm -rf $(GENERATED)
	$(PROGRAM) generate $(GENERATED)
	sed 's|@BINDIR@|$(BINDIR)|' packaging/turnstile.service.in >$(GENERATED)/turnstile.service

# What is installed together is of one version.
install: generated $(if $(wildcard $(MUSL_LIBRARY)),musl)
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR) $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(DOCDIR) \
	    $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR)
	$(call replace,755,$(PROGRAM),$(DESTDIR)$(BINDIR)/turnstile)
	$(call replace,644,$(LIBRARY),$(DESTDIR)$(LIBDIR)/libturnstile.so)
ifneq ($(wildcard $(MUSL_LIBRARY)),)
	$(call replace,755,$(MUSL_PROGRAM),$(DESTDIR)$(BINDIR)/turnstile-static)
	$(call replace,644,$(MUSL_LIBRARY),$(DESTDIR)$(LIBDIR)/libturnstile-musl.so)
	$(call both_names,$(DESTDIR)$(LIBDIR))
endif
	$(INSTALL) -m 644 $(GENERATED)/man/*.1 $(DESTDIR)$(MANDIR)/man1
	$(INSTALL) -m 644 $(GENERATED)/turnstile.bash $(DESTDIR)$(BASHDIR)/turnstile
	$(INSTALL) -m 644 $(GENERATED)/_turnstile $(DESTDIR)$(ZSHDIR)/_turnstile
	$(INSTALL) -m 644 $(GENERATED)/turnstile.fish $(DESTDIR)$(FISHDIR)/turnstile.fish
	$(INSTALL) -m 644 README.md docs/*.md LICENSE-MIT LICENSE-APACHE $(DESTDIR)$(DOCDIR)
ifeq ($(SYSTEMD),yes)
	$(INSTALL) -d $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR)
	$(INSTALL) -m 644 $(GENERATED)/turnstile.service packaging/turnstile.socket $(DESTDIR)$(UNITDIR)
	$(INSTALL) -m 644 packaging/turnstile.sysusers $(DESTDIR)$(SYSUSERSDIR)/turnstile.conf
endif
ifeq ($(DESTDIR),)
	-ldconfig
ifeq ($(SYSTEMD),yes)
	@echo "The host's broker: systemd-sysusers && systemctl daemon-reload && systemctl enable --now turnstile.socket"
endif
endif

# Under the names that a glibc system knows them by, too: there is no other to be mixed up with.
install-musl: musl
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR)
	$(call replace,755,$(MUSL_PROGRAM),$(DESTDIR)$(BINDIR)/turnstile)
	$(call replace,644,$(MUSL_LIBRARY),$(DESTDIR)$(LIBDIR)/libturnstile-musl.so)
	ln -sfn libturnstile-musl.so $(DESTDIR)$(LIBDIR)/libturnstile.so

uninstall:
	rm -rf $(DESTDIR)$(LIBDIR)/libturnstile.both
	rm -f $(DESTDIR)$(BINDIR)/turnstile-static $(DESTDIR)$(LIBDIR)/libturnstile-musl.so
	rm -f $(DESTDIR)$(BINDIR)/turnstile $(DESTDIR)$(LIBDIR)/libturnstile.so $(DESTDIR)$(MANDIR)/man1/turnstile.1 \
	    $(DESTDIR)$(MANDIR)/man1/turnstile-*.1 $(DESTDIR)$(BASHDIR)/turnstile $(DESTDIR)$(ZSHDIR)/_turnstile \
	    $(DESTDIR)$(FISHDIR)/turnstile.fish $(DESTDIR)$(UNITDIR)/turnstile.service \
	    $(DESTDIR)$(UNITDIR)/turnstile.socket $(DESTDIR)$(SYSUSERSDIR)/turnstile.conf
	rm -rf $(DESTDIR)$(DOCDIR)
ifeq ($(DESTDIR),)
	-ldconfig
endif

# By dpkg-deb, from what `install` puts below /usr.
deb: build $(if $(wildcard $(MUSL_LIBRARY)),musl)
	packaging/deb $(TARGET)
