@setlocal
@set "CARD=h100"
@set "VRAM=80GB"
@call "%~dp0launch.bat" %*
