# Installs turnstile: `make && sudo make install`; `make deb` makes a Debian package. Tests: tests/run.
#
#   PREFIX=/usr/local      where to. SQLite finds the extension as `libturnstile` below /usr and /usr/local
#   DESTDIR=               put in front of every path, for packages; nothing outside of it is touched then
#   SYSTEMD=yes            also unit, socket unit and user of the host's broker; `no` leaves them out
#   TARGET=target/release  what is installed; a build that is there already is not built again with BUILD=no

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

PROGRAM = $(TARGET)/turnstile
LIBRARY = $(TARGET)/libturnstile.so
# Man pages, completions and the unit with this PREFIX, made by the program itself.
GENERATED = $(TARGET)/packaging

.PHONY: all build generated install uninstall deb
all: build

build:
ifeq ($(BUILD),yes)
	$(CARGO) build --release --lib --bins
endif

generated: build
	rm -rf $(GENERATED)
	$(PROGRAM) generate $(GENERATED)
	sed 's|@BINDIR@|$(BINDIR)|' packaging/turnstile.service.in >$(GENERATED)/turnstile.service

install: generated
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(LIBDIR) $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(DOCDIR) \
	    $(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(FISHDIR)
# In a new file and renamed over the old one: programs have that one mapped.
	$(INSTALL) -m 755 $(PROGRAM) $(DESTDIR)$(BINDIR)/turnstile.new
	mv -f $(DESTDIR)$(BINDIR)/turnstile.new $(DESTDIR)$(BINDIR)/turnstile
	$(INSTALL) -m 644 $(LIBRARY) $(DESTDIR)$(LIBDIR)/libturnstile.so.new
	mv -f $(DESTDIR)$(LIBDIR)/libturnstile.so.new $(DESTDIR)$(LIBDIR)/libturnstile.so
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

uninstall:
	rm -f $(DESTDIR)$(BINDIR)/turnstile $(DESTDIR)$(LIBDIR)/libturnstile.so $(DESTDIR)$(MANDIR)/man1/turnstile.1 \
	    $(DESTDIR)$(MANDIR)/man1/turnstile-*.1 $(DESTDIR)$(BASHDIR)/turnstile $(DESTDIR)$(ZSHDIR)/_turnstile \
	    $(DESTDIR)$(FISHDIR)/turnstile.fish $(DESTDIR)$(UNITDIR)/turnstile.service \
	    $(DESTDIR)$(UNITDIR)/turnstile.socket $(DESTDIR)$(SYSUSERSDIR)/turnstile.conf
	rm -rf $(DESTDIR)$(DOCDIR)
ifeq ($(DESTDIR),)
	-ldconfig
endif

# By dpkg-deb, from what `install` puts below /usr.
deb: build
	packaging/deb $(TARGET)
