@setlocal
@set "CARD=rtx3060_12gb"
@set "VRAM=12GB"
@call "%~dp0launch.bat" %*
